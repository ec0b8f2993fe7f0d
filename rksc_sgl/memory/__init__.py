"""What is kept of forks when memory is short, who starts, and who is retracted: plain values in, decisions out."""

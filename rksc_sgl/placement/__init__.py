"""What a waiting branch gets: decided on plain values, without SGLang."""

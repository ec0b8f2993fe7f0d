"""What is known of a generated text: the ids that spell it, how sure the model was, how a stream adds up. No SGLang."""

"""Stage 1, on Ray Data: a corpus -> conversations with the teacher's top-k logprobs."""

"""Training: corpora, tokenizers, batches, and the loop that uses them."""

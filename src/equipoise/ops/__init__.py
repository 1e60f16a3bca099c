"""Pure tensor functions, one idea per file. They know tensors and the nouns of `types`, no module and no config."""

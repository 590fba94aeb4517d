"""Language models: encoder, reranker, their objectives and texts. No Ray, no DeepSpeed."""

"""Fine-tuning: the DeepSpeed engine, its checkpoints, and the Ray Train worker around it."""

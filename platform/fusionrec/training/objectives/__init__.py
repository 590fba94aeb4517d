"""What a language model can be trained for: one task a file, over one of the losses."""

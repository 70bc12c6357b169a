"""How a model learns. Read loop first; engine is the only file that knows DeepSpeed."""

"""`lit-rlhf ai-feedback`: a language model labels pairs of responses, or criticises and revises responses by written principles."""

"""Fine-tune a language model, keep the right checkpoint, and know whether it is better than its base."""

__version__ = "0.1.0"

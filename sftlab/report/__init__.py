"""Reports: terminal, figure, page, model card."""

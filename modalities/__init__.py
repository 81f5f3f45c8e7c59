"""What a model is: how it loads, where its blocks and matrices are, what calibrates and measures it."""

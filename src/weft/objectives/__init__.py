"""What models are trained for. Each objective is a file: terms with their counts, from a batch and the models it names."""

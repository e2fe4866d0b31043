"""What is applied to models from outside."""

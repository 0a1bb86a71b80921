"""A page on which a pipeline is played with: plain and accelerated side by side."""

"""How each embedded pipeline is trained: one module per pipeline, run through
``python -m lesa_testbed.train``."""

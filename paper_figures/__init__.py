"""The paper's figures and tables: what each needs, draws and claims. Drawn by ``python scripts/reproduce.py``."""

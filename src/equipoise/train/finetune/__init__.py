"""Fine-tuning: a run that begins with the weights of another one, and may train only part of them.

Read `config.py` for what can be chosen, `tuning.py` for what a step does differently, docs/finetuning.md for when to
choose what.
"""

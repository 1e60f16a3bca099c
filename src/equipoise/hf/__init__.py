"""equipoise's expert products for the MoE models of transformers 5: `experts_implementation="equipoise"`.

    import equipoise.hf
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="equipoise")

Importing this package registers the name with transformers' experts interface (transformers:integrations/moe.py), the
one thing that happens. Router, weights, files and everything else of the model stay transformers' own.
Raises ModuleNotFoundError without transformers 5.
"""

from equipoise.hf.explain import LayerPath, explain
from equipoise.hf.register import NAME, register

register()

__all__ = ["NAME", "LayerPath", "explain", "register"]

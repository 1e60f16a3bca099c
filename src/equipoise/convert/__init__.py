"""Checkpoints of others in and out, tensor by tensor, with every one accounted for."""

from equipoise.convert.families import FAMILIES
from equipoise.convert.read import Converted, import_checkpoint
from equipoise.convert.write import Exported, export_checkpoint

__all__ = ["FAMILIES", "Converted", "Exported", "export_checkpoint", "import_checkpoint"]

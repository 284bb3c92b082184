"""Auxiliary tasks that need no labels: each module makes inputs and labels, or a loss, from images alone."""

from auxjax.tasks.rotation import all_rotations as all_rotations
from auxjax.tasks.rotation import rotate_batch as rotate_batch
from auxjax.tasks.rotation import rotation_batch as rotation_batch

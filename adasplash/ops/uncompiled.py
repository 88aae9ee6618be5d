"""Functions that stay out of compiled graphs; imported where a graph is made.

As a decorator, torch.compiler.disable would import the compiler, which takes as long as torch itself, with the package.
"""

import torch

from . import range_attention

attend_ranges = torch.compiler.disable(range_attention.attend_ranges)

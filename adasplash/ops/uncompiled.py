"""Functions that stay out of compiled graphs; imported where a graph is made.

As decorators, torch.compiler's functions would import the compiler, which takes as long as torch itself, with the package.
"""

import torch

from . import announce, range_attention

attend_ranges = torch.compiler.disable(range_attention.attend_ranges)
say_once = torch.compiler.assume_constant_result(announce.say_once)

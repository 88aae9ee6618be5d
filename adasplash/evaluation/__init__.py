"""What a trained model is worth: perplexity, throughput, sparsity, and the file and tables they are kept in."""

from .perplexity import Perplexity, PositionBin, measure_perplexity
from .plots import attention_colours, plot_perplexity_by_position, plot_support
from .results import merge_results, read_results, result_row, result_tables
from .sparsity import Sparsity, measure_sparsity
from .support import draw_support
from .tables import TextTable, print_tables, text_table
from .throughput import Throughput, measure_throughput

__all__ = [
    "Perplexity",
    "PositionBin",
    "Sparsity",
    "TextTable",
    "Throughput",
    "attention_colours",
    "draw_support",
    "measure_perplexity",
    "measure_sparsity",
    "measure_throughput",
    "merge_results",
    "plot_perplexity_by_position",
    "plot_support",
    "print_tables",
    "read_results",
    "result_row",
    "result_tables",
    "text_table",
]

"""Utilization and compression reports: tables for a terminal, JSON, plots, and self-contained HTML pages.

In: subspaces, factors and measured errors. Out: UtilizationReport and CompressionReport.
"""

from .compression import CompressionReport as CompressionReport
from .kinds import KINDS as KINDS
from .kinds import kind_of as kind_of
from .per_layer import LayerCompression as LayerCompression
from .per_layer import LayerUtilization as LayerUtilization
from .text import format_table as format_table
from .text import new_figure as new_figure
from .utilization import UtilizationReport as UtilizationReport
from .utilization import utilization as utilization

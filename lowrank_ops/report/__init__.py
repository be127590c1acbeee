"""What was measured and what was done: Mean Layer Utilization and compression.

As tables for a terminal, JSON, pictures, and one page of HTML that needs nothing but itself.
"""

from .compression import CompressionReport as CompressionReport
from .compression import LayerCompression as LayerCompression
from .kinds import KINDS as KINDS
from .kinds import kind_of as kind_of
from .text import format_table as format_table
from .text import new_figure as new_figure
from .utilization import LayerUtilization as LayerUtilization
from .utilization import UtilizationReport as UtilizationReport
from .utilization import utilization as utilization

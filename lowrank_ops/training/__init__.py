"""Fine-tuning of a compressed model.

In: a compressed model and batches, with a loss, the dense model as teacher, or both. Out: the model, trained in place.
"""

from .finetune import FinetuneReport as FinetuneReport
from .finetune import finetune_ as finetune_

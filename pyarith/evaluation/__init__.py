"""How well a model answers, as it is or with heads ablated: items, answers from free text, accuracy, transfer."""

from pyarith.evaluation.answers import extract_number, extract_text, is_match, numbers
from pyarith.evaluation.evaluate import Change, Evaluation, changes, evaluate
from pyarith.evaluation.generate import generate
from pyarith.evaluation.harness import harness_scores
from pyarith.evaluation.heads import HeadList, load_heads, save_heads
from pyarith.evaluation.items import Items, items_from_rows, load_items
from pyarith.evaluation.score import Accuracy, accuracy
from pyarith.evaluation.tasks import named_task
from pyarith.evaluation.transfer import transfer
from pyarith.evaluation.transfer_result import TransferResult

__all__ = [
    "Accuracy",
    "Change",
    "Evaluation",
    "HeadList",
    "Items",
    "TransferResult",
    "accuracy",
    "changes",
    "evaluate",
    "extract_number",
    "extract_text",
    "generate",
    "harness_scores",
    "is_match",
    "items_from_rows",
    "load_heads",
    "load_items",
    "named_task",
    "numbers",
    "save_heads",
    "transfer",
]

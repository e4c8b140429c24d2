"""All records: MindSpeed's own flags by name, and its values of flags that Megatron has.

Names, values and meanings are those of Ascend/MindSpeed, the branches core_r0.6.0 to core_r0.18.0 and master, and of
Ascend/MindSpeed-LLM, 1.0 to 26.1 and master (before 2.0 called ModelLink): every flag that their training parsers
define. Their launchers, searches and data tools have parsers of their own.
"""

from mindspeed_cp.patches.mindspeed.attention import ATTENTION, ATTENTION_VALUES
from mindspeed_cp.patches.mindspeed.experts import EXPERTS, EXPERTS_VALUES
from mindspeed_cp.patches.mindspeed.masks import MASKS, MASKS_VALUES
from mindspeed_cp.patches.mindspeed.models import MODELS, MODELS_VALUES
from mindspeed_cp.patches.mindspeed.older import OLDER
from mindspeed_cp.patches.mindspeed.operators import OPERATORS
from mindspeed_cp.patches.mindspeed.programs import PROGRAMS, PROGRAMS_VALUES
from mindspeed_cp.patches.mindspeed.record import Record

SECTIONS: dict[str, tuple[Record, ...]] = {
    "Attention and its context parallelism": ATTENTION,
    "Who sees whom": MASKS,
    "Mixtures of experts": EXPERTS,
    "The model": MODELS,
    "Operators, communication, memory, reports": OPERATORS,
    "Tokenizers, data, and other programs": PROGRAMS,
    "Megatron's in other releases": OLDER,
}
"""Flags, by subject."""

VALUES: tuple[Record, ...] = (*ATTENTION_VALUES, *MASKS_VALUES, *EXPERTS_VALUES, *MODELS_VALUES, *PROGRAMS_VALUES)
"""Values of Megatron's flags that MindSpeed adds: `values` is the value, its beginning before `*`, or `X` for a number
that is not written as a whole one."""

FLAGS: dict[str, Record] = {record.name: record for section in SECTIONS.values() for record in section}
"""Flags by name."""

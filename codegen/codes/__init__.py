"""Table of diagnostic codes with explanations and remedies. `sagellm explain SAGE006` prints an entry.

Ranges: 0xx YAML and schema, 1xx ops and the compute language, 2xx models, 3xx passes, 5xx the generator itself,
6xx formats, 7xx dialects.
A code never changes its meaning, and the code of a removed diagnostic is never reused.
"""

from sageLLM.codegen.codes import files, models, ops, passes
from sageLLM.codegen.codes.info import CodeInfo

CODES: dict[str, CodeInfo] = files.CODES | ops.CODES | models.CODES | passes.CODES

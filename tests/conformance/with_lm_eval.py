"""lm-eval's `local-completions` over HTTP, against its Hugging Face model in process: equal scores and answers.

    python with_lm_eval.py URL CHECKPOINT

The tasks score the log-likelihood of alternatives, and generate until a stop string; they need no network.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

URL, CHECKPOINT = sys.argv[1:3]
QUESTIONS = [
    {"question": "import os\nimport ", "choices": ["sys\n", "banana\n", "zebra\n"], "answer": 0},
    {"question": "def main(", "choices": ["self):\n", "42 42", "]]"], "answer": 0},
    {"question": "class Tree:\n    def __init__(", "choices": ["self", "import", "return"], "answer": 0},
    {"question": "for i in range(", "choices": ["len(", "):", "class"], "answer": 0},
    {"question": "return ", "choices": ["self.", "(((", "\n\n\n"], "answer": 0},
]
CHOICE = """task: code_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """task: code_lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(model: str, arguments: str, folder: Path) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = ["code_choice", "code_lines"]
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, log_samples=True, batch_size=4
    )


def responses(found: dict, task: str) -> list:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "generation.yaml").write_text(GENERATION.format(data=data))
    served = evaluate(
        "local-completions",
        f"model=tiny,base_url={URL}/v1/completions,tokenizer={CHECKPOINT},tokenizer_backend=huggingface,"
        "num_concurrent=2,max_length=512,add_bos_token=False",
        folder,
    )
    local = evaluate("hf", f"pretrained={CHECKPOINT},dtype=float32,device=cpu,add_bos_token=False", folder)

for task, metrics in local["results"].items():
    for metric, value in metrics.items():
        if isinstance(value, float):
            assert value == served["results"][task][metric], (task, metric, value, served["results"][task][metric])
            print(task, metric, value)
pairs = zip(responses(served, "code_choice"), responses(local, "code_choice"), strict=True)
distances = [abs(a[0] - b[0]) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
assert len(distances) == 15 and max(distances) < 1e-3, distances
assert responses(served, "code_lines") == responses(local, "code_lines")
print("largest difference of a log-likelihood:", max(distances))

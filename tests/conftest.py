import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for a hub is a mistake

import torch  # noqa: E402

torch.set_num_threads(1)  # many short operations: two threads mostly wait for each other, far longer on a busy machine

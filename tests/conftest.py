"""Settings for all tests: one thread, no progress bars, and a module cache of their own for code in checkpoints."""

import os
import tempfile

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="secateur-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

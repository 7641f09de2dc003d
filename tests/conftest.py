"""Shared by every test: two threads, so that timings and block plans are the same on any machine."""

import torch

torch.set_num_threads(2)

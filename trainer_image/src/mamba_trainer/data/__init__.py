"""From text to batches: prepare text once into memory-mapped tokens, then read them in a resumable order.

`prepare` writes what `tokenfile` defines (or `megatron` reads), `dataset` cuts it into windows, `order` says
which window comes when. Nothing here imports torch: batches are numpy arrays.
"""

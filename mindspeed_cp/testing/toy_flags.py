"""Megatron's flags for training a toy GPT on one machine; prints them one a line, for scripts of a shell.

    mapfile -t model_flags < <(python -m mindspeed_cp.testing.toy_flags)

Sizes, data, learning rate and parallelism are for the caller to add; of a flag that is given twice the last one counts.
"""

TOY_FLAGS = (
    *("--position-embedding-type", "rope", "--attention-dropout", "0", "--hidden-dropout", "0"),
    # A toy at the usual initialisation is less sensitive to attention errors: a wrong one would go unnoticed.
    *("--init-method-std", "0.2"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "257", "--split", "100,0,0"),
    *("--eval-iters", "0", "--eval-interval", "1000000", "--log-interval", "1"),
    *("--micro-batch-size", "1", "--lr", "1e-3", "--lr-decay-style", "constant"),
    # Each rank would start six processes to load what is in memory.
    *("--num-workers", "0"),
)

if __name__ == "__main__":
    print("\n".join(TOY_FLAGS))

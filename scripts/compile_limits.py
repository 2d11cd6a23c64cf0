"""What compile_check.py holds the CUDA kernels to."""

from __future__ import annotations

# Kernels that must keep everything in registers: names as the table prints them, with wildcards.
NO_SPILLS = (
    *("mixing_*", "softmax_cross_entropy_rows*", "scale_elements*", "scan_rows*"),
    # thought_attention in 16 bits
    *("forward_kernel<*Float16, *", "row_gradients_kernel<*Float16, *"),
    *("key_gradients_kernel<*Float16, *", "slot_gradients_kernel<*Float16, *"),
    *("merge_kernel<*", "diagonal_*"),
)
# What they spill all the same, in bytes at most: where nothing was measured, so that nothing was tuned.
KNOWN_SPILLS = {
    ("softmax_cross_entropy_rows_plain<*Float16, true>", "sm_120"): 24,
    ("key_gradients_kernel<*Float16, 128, *", "sm_120"): 16,  # one number, outside of the loops
}

# Kernels that write rows 16 bytes at a time, by file. The compiler takes a copied pack apart where it
# can see through the copy; the PTX shows that already.
WIDE = {
    "linear_cross_entropy.cu": (
        *("softmax_cross_entropy_rows<*, true>", "softmax_cross_entropy_rows_plain<*, true>"),
        "scale_elements*",
    ),
    "mixing_head.cu": ("mixing_*_kernel<*, true*>",),
}

HMMA, EX2 = "HMMA.16816.F32.BF16", "MUFU.EX2"
LDGSTS, LDGSTS_4 = "LDGSTS.E.BYPASS.128", "LDGSTS.E"  # of 16 bytes and of 4
# The loops that a file's kernels spend their time in: the operation that a loop has more of than any
# other, and the most instructions of sm_90 that a round of it may take.
LOOPS = {
    "linear_cross_entropy.cu": {
        "softmax_cross_entropy_rows_plain<*": ("FADD", 157),  # 32 elements of the loss
        "softmax_cross_entropy_rows_plain<*, true>": ("MUFU.EX2", 137),  # of the gradient
    },
    "mixing_head.cu": {
        "mixing_first_kernel<*Float16, true>": ("FADD", 60),  # 8 elements
        "mixing_tail_kernel<*Float16, true, *>": ("FFMA", 79),  # 16 elements of the dot product
        "mixing_tail_backward_kernel<*Float16, true, 256>": ("FFMA", 215),  # 8 elements
        "mixing_first_backward_kernel<*Float16, true>": ("LDG.E.128", 104),  # 8 elements of a row
    },
    # A tile of 32 keys forward, of 32 (heads of 64: 64) in the row kernel, 32 rows in the key kernel;
    # without loads, and one round of the loops over the head. In the slot kernel, fetching 32 rows, and
    # p and ds of 32 rows.
    "thought_attention_forward_128.cu": {"forward_kernel<BFloat16, *": (HMMA, 435)},
    "thought_attention_forward_64.cu": {"forward_kernel<BFloat16, *": (HMMA, 348)},
    "thought_attention_backward_128.cu": {
        "row_gradients_kernel<BFloat16, *": (HMMA, 483),
        "key_gradients_kernel<BFloat16, *": (HMMA, 423),
        "slot_gradients_kernel<BFloat16, 128>": (LDGSTS_4, 454),
        "slot_gradients_kernel<BFloat16, *": (EX2, 393),
    },
    "thought_attention_backward_64.cu": {
        "row_gradients_kernel<BFloat16, *": (HMMA, 617),
        "key_gradients_kernel<BFloat16, *": (HMMA, 310),
        "slot_gradients_kernel<BFloat16, 64>": (LDGSTS_4, 387),
        "slot_gradients_kernel<BFloat16, *": (EX2, 344),
    },
    # 16 rows of a column, forward and backward, rows past the end and the loops' second rounds left out.
    "thought_diagonal.cu": {
        "diagonal_forward_staged<BFloat16, 128>": (LDGSTS, 794),
        "diagonal_forward_staged<BFloat16, 64>": (LDGSTS, 544),
        "diagonal_backward_staged<BFloat16, 128>": (LDGSTS, 861),
        "diagonal_backward_staged<BFloat16, 64>": (LDGSTS, 689),
    },
    "sample_tokens.cu": {
        # 1024 elements, the loads of the next ones included
        "scan_rows_fast<*": ("MUFU.EX2", 252),
        "sample_rows_fast<*": ("MUFU.EX2", 252),
    },
}

# Loops that load for their next round: the operation as above, the load, and after how many instructions
# at the earliest one may wait for it. The compiler puts a load late where registers are short.
AHEAD = {
    "sample_tokens.cu": {
        "scan_rows_fast<*": ("MUFU.EX2", "LDG.E.128", 200),
        "sample_rows_fast<*": ("MUFU.EX2", "LDG.E.128", 200),
    },
}

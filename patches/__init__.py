"""What is changed in Megatron, one file a concern. Imported as `mindspeed_cp.patches`."""

if __name__ != "mindspeed_cp.patches":
    raise ImportError(
        f"the patches were imported as {__name__!r}; import them as 'mindspeed_cp.patches', "
        f"so that each patch exists only once."
    )

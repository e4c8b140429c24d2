"""MindSpeed's and MindSpeed-LLM's flags: what each is here, and the command line that Megatron is given instead."""

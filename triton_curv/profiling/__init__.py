"""Where the time of a training step goes: stages from a torch.profiler trace or an Nsight Systems export, and roofs."""

"""The time of a step before it is run, from what is measured here and a link that is described.

    step_bytes   what each rank hands over, exactly, by a real Plan
    path_costs   what encoders, decoders and memory take here (mirror: one rank's whole way without the others);
    gloo_costs   and what the engine takes
    network      how long the link is busy with an operation
    timeline     one step played through on the library's own schedule: computation, processor and link side by side
    advice       every method's step, and which to use; chart: its picture; model_shapes: whose gradients
    decide       the same among real ranks, for compression="auto"

`gcompress plan` and benchmarks/scale.py are made of these.
"""

"""Packages by name: `patches` lies at the top level and is imported as `mindspeed_cp.patches`; no test is installed."""

from setuptools import setup

setup(
    packages=[
        "mindspeed_cp",
        "mindspeed_cp.attention",
        "mindspeed_cp.benchmark",
        "mindspeed_cp.comm",
        "mindspeed_cp.diffusion",
        "mindspeed_cp.inference",
        "mindspeed_cp.kernels",
        "mindspeed_cp.launch",
        "mindspeed_cp.patches",
        "mindspeed_cp.patches.mindspeed",
        "mindspeed_cp.plan",
        "mindspeed_cp.planner",
        "mindspeed_cp.program",
        "mindspeed_cp.tensor_parallel",
        "mindspeed_cp.testing",
    ],
    package_dir={"mindspeed_cp.patches": "patches", "mindspeed_cp.patches.mindspeed": "patches/mindspeed"},
    package_data={"mindspeed_cp": ["py.typed"]},
)

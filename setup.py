"""Names the packages; all other metadata is in pyproject.toml.

kernels/, engine/, training/ and benchmarks/ become packages of `trunkline` through the links in src/trunkline: a
top-level package called `kernels` would be taken for Hugging Face's package of that name. For the same reason they and
their rooms have no `__init__.py`.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages("src", include=["trunkline*"], exclude=["*.results*", "*.configs*"]),
    package_dir={"": "src"},
    package_data={
        "trunkline": ["py.typed"],
        "trunkline.serving": ["*.html"],
        "trunkline.training": ["configs/*.*", "pages/*.jinja"],
    },
)

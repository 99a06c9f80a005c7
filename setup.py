"""Build of minipaged; metadata and tool settings are in pyproject.toml. This adds the C library."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "capi"))

import build_capi  # noqa: E402

FOLDER = ("minipaged", "clib")


class BuildCapi(build_ext):
    """Builds libminipaged into ``minipaged/clib``. Where that is not possible the package is installed
    without it: the build log and ``minipaged config`` say why."""

    def run(self):
        base = ROOT if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
        try:
            print(f"built {build_capi.build(base.joinpath(*FOLDER))}")
        except build_capi.CannotBuild as error:
            print(f"\nlibminipaged was NOT built: {error}.\nThe Python package works without it.\n", file=sys.stderr)

    def get_outputs(self):
        return [str(path) for path in Path(self.build_lib).joinpath(*FOLDER).rglob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


# The extension tells setuptools that the wheel belongs to this Python and platform; its files are BuildCapi's.
setup(ext_modules=[Extension("minipaged.clib", sources=[])], cmdclass={"build_ext": BuildCapi})

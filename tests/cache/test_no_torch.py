"""The cache decides over ids: importing it must not load torch."""

import subprocess
import sys


def test_importing_cache_and_policies_loads_no_torch():
    code = (
        "import sys, pkgutil, importlib, kvwise.cache, kvwise.policies\n"
        "for package in (kvwise.cache, kvwise.policies):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "bad = sorted({'torch', 'transformers', 'pandas'} & set(sys.modules))\n"
        "sys.exit(f'loaded {bad}' if bad else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

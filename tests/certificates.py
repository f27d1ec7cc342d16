"""Certificates for tests, made by openssl."""

import shutil
import subprocess
from pathlib import Path


def make_certificates(folder: Path) -> Path:
    """ca.pem, other.pem (another CA), server.pem and client.pem (of ca, for broker.test),
    expired.pem (the same, but over since 2020), each with its .key. Returns the folder."""
    openssl = shutil.which("openssl")
    assert openssl is not None

    def make(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    new = ("req", "-x509", *curve, "-days", "2")
    for name in ("ca", "other"):
        make(*new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name in ("server", "client"):
        make(
            *(*new, "-CA", "ca.pem", "-CAkey", "ca.key", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=DNS:broker.test", "-addext", "basicConstraints=CA:FALSE"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )
    # `openssl req` of version 3.0 knows no start date; `openssl ca` does.
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01\n")
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=one\n[one]\ndatabase=index.txt\nserial=serial\nnew_certs_dir=.\n"
        "default_md=sha256\npolicy=any\nx509_extensions=ext\n[any]\ncommonName=supplied\n"
        "[ext]\nsubjectAltName=DNS:broker.test\nbasicConstraints=CA:FALSE\n"
    )
    make("req", "-new", *curve, "-keyout", "expired.key", "-out", "expired.csr", "-subj", "/CN=old")
    make(
        *("ca", "-batch", "-config", "ca.conf", "-cert", "ca.pem", "-keyfile", "ca.key"),
        *("-startdate", "20190101000000Z", "-enddate", "20200101000000Z", "-notext"),
        *("-in", "expired.csr", "-out", "expired.pem"),
    )
    return folder

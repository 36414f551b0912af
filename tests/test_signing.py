"""Signed bundles: with a key given, what is not signed with it is refused before anything of it is read."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_bundle import tiny_bundle

import dfq_deploy as dfq
from calibrators.errors import BundleError, RecipeError
from dfq_deploy.cli import run
from exporters.bundle import MANIFEST, open_bundle, seal_bundle
from exporters.signing import PASSWORD, SIGNATURE, signer, verifier


class Keys(NamedTuple):
    private: Path
    public: Path


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def _pair(folder: Path, *options: str) -> Keys:
    folder.mkdir()
    keys = Keys(folder / "key.pem", folder / "key.pub.pem")
    _openssl("genpkey", "-algorithm", "ed25519", "-out", keys.private)
    _openssl("pkey", "-in", keys.private, "-pubout", "-out", keys.public)
    if options:
        _openssl("pkey", "-in", keys.private, "-out", folder / "locked.pem", *options)
        (folder / "locked.pem").replace(keys.private)
    return keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return _pair(tmp_path_factory.mktemp("keys") / "own")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return _pair(tmp_path_factory.mktemp("keys") / "others")


@pytest.fixture
def bundle(tmp_path: Path, keys: Keys) -> Path:
    """A signed bundle."""
    folder = tiny_bundle(tmp_path / "bundle")
    seal_bundle(folder, open_bundle(folder), [*open_bundle(folder).files], sign=signer(keys.private))
    return folder


def test_a_signature_is_verified_by_openssl_too(bundle: Path, keys: Keys) -> None:
    assert open_bundle(bundle, verify=keys.public).model.name == "tiny"
    files = ["-in", bundle / MANIFEST, "-sigfile", bundle / SIGNATURE]
    _openssl("pkeyutl", "-verify", "-pubin", "-inkey", keys.public, "-rawin", *files)


def test_a_signature_of_openssl_is_verified(bundle: Path, keys: Keys) -> None:
    (bundle / SIGNATURE).unlink()
    files = ["-in", bundle / MANIFEST, "-out", bundle / SIGNATURE]
    _openssl("pkeyutl", "-sign", "-inkey", keys.private, "-rawin", *files)
    assert open_bundle(bundle, verify=keys.public).model.name == "tiny"


def _unsigned(bundle: Path) -> None:
    (bundle / SIGNATURE).unlink()


def _one_byte(bundle: Path) -> None:
    content = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(content.replace(b'"tiny"', b'"tony"', 1))


def _one_space(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes() + b" ")


def _resealed(bundle: Path) -> None:
    """Other classes, with a manifest that vouches for them and the signature of before."""
    signature, manifest = (bundle / SIGNATURE).read_bytes(), open_bundle(bundle)
    (bundle / "classes.txt").write_text("cat\ndog\nmouse\n")
    seal_bundle(bundle, manifest, [*manifest.files])
    (bundle / SIGNATURE).write_bytes(signature)


def _cut_short(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes((bundle / SIGNATURE).read_bytes()[:-1])


def _empty(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes(b"")


def _linked(bundle: Path) -> None:
    (bundle / SIGNATURE).rename(bundle.with_name("signature"))
    (bundle / SIGNATURE).symlink_to(bundle.with_name("signature"))


def _malformed(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b"{")


_TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no signature": (_unsigned, "is not signed"),
    "a link for a signature": (_linked, "is not signed"),
    "another manifest": (_one_byte, "signature of .* is wrong"),
    "a space more": (_one_space, "signature of .* is wrong"),
    "other files under their own hashes": (_resealed, "signature of .* is wrong"),
    "half a signature": (_cut_short, "signature of .* is wrong"),
    "an empty signature": (_empty, "signature of .* is wrong"),
    "no manifest to speak of": (_malformed, "signature of .* is wrong"),
}


@pytest.mark.parametrize("kind", _TAMPERED)
def test_what_is_not_signed_with_the_key_is_refused(bundle: Path, keys: Keys, kind: str) -> None:
    change, said = _TAMPERED[kind]
    change(bundle)
    with pytest.raises(BundleError, match=said):
        dfq.load(bundle, verify=keys.public)


def test_another_key_is_refused(bundle: Path, others: Keys) -> None:
    with pytest.raises(BundleError, match=r"signature of .* is wrong") as caught:
        dfq.load(bundle, verify=others.public)
    assert "another key" in caught.value.why


def test_an_altered_file_under_a_good_signature_is_refused(bundle: Path, keys: Keys) -> None:
    (bundle / "model.onnx").write_bytes(b"another model")
    with pytest.raises(BundleError, match="altered"):
        dfq.load(bundle, verify=keys.public)


def test_a_signature_is_not_asked_for_without_a_key(bundle: Path) -> None:
    _one_space(bundle)
    assert open_bundle(bundle).model.name == "tiny"


def test_a_password_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = _pair(tmp_path / "locked", "-aes256", "-passout", "pass:open sesame")
    with pytest.raises(RecipeError, match="cannot be read as an Ed25519 private key") as caught:
        signer(keys.private)
    assert PASSWORD in caught.value.fix
    monkeypatch.setenv(PASSWORD, "close sesame")
    with pytest.raises(RecipeError, match="cannot be read as an Ed25519 private key"):
        signer(keys.private)
    monkeypatch.setenv(PASSWORD, "open sesame")
    signer(_pair(tmp_path / "open").private)  # which has none
    verifier(keys.public)(b"manifest", signer(keys.private)(b"manifest"), "bundle")


def test_what_is_no_key_is_told_before_anything_else(
    tmp_path: Path, keys: Keys, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rsa = tmp_path / "rsa.pem"
    _openssl("genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:1024", "-out", rsa)
    (tmp_path / "text").write_text("no key")
    for key in (rsa, tmp_path / "text", tmp_path / "nowhere", keys.public, tmp_path):
        arguments = ["export", "--model", "demo", "--out", str(tmp_path / "out"), "--sign", str(key)]
        assert run(arguments) == 3
        said = capsys.readouterr().err
        assert "cannot be read as an Ed25519 private key" in said
        assert len(said.splitlines()) == 3
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="as an Ed25519 public key"):
        open_bundle(bundle, verify=keys.private)


def test_without_the_package_it_says_which_extra_has_it(bundle: Path, keys: Keys) -> None:
    script = (
        "import sys; sys.modules['cryptography'] = None; from dfq_deploy.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    plain = subprocess.run([sys.executable, "-c", script, "show", bundle], capture_output=True, text=True)
    assert (plain.returncode, plain.stderr) == (0, "")
    command = [sys.executable, "-c", script, "show", bundle, "--verify", keys.public]
    asked = subprocess.run(command, capture_output=True, text=True)
    assert asked.returncode == 3
    assert "pip install 'dfq-deploy[sign]'" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_an_archive_is_signed_and_the_folder_stays_as_it_was(
    bundle: Path, tmp_path: Path, keys: Keys, others: Keys
) -> None:
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    dfq.pack(bundle, tmp_path / "kept.zip")
    dfq.pack(bundle, tmp_path / "signed.zip", sign=others.private, verify=keys.public)
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    dfq.load(tmp_path / "kept.zip", verify=keys.public).close()
    dfq.load(tmp_path / "signed.zip", verify=others.public).close()
    with pytest.raises(BundleError, match=r"signature of .* is wrong"):
        dfq.load(tmp_path / "signed.zip", verify=keys.public)


def test_a_build_signs_anew_and_lets_no_signature_of_before_stand(
    demo_bundle: Path, tmp_path: Path, keys: Keys, others: Keys
) -> None:
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("work"))
    dfq.build(folder, sign=keys.private)
    with pytest.raises(BundleError, match=r"signature of .* is wrong"):
        dfq.build(folder, verify=others.public)
    dfq.build(folder, verify=keys.public, sign=others.private)
    open_bundle(folder, verify=others.public)
    dfq.build(folder)
    assert not (folder / SIGNATURE).exists()


def test_an_export_signs_and_its_recipe_does_not_know_it(
    demo_bundle: Path, tmp_path: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    run_again = [
        "export",
        "--model",
        "demo",
        "--generator",
        "noise",
        "--count",
        "8",
        "--refine",
        "none",
        "--limit",
        "4",
    ]
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = (folder / MANIFEST).read_bytes()
    assert run([*run_again, "--out", str(folder), "--sign", str(keys.private)]) == 0
    assert (folder / MANIFEST).read_bytes() == manifest, "a finished run is signed as it is"
    assert "sign" not in json.loads(manifest)["recipe"]
    for command in (["show"], ["check", "--limit", "2"], ["sensitivity", "--limit", "2"]):
        assert run([command[0], str(folder), *command[1:], "--verify", str(keys.public)]) == 0
    assert f"signed with the key of {keys.public}" in capsys.readouterr().out
    assert run(["show", str(folder)]) == 0
    assert "not verified" in capsys.readouterr().out
    assert run([*run_again, "--out", str(folder), "--scheme", "w8a8_asym"]) == 0
    assert not (folder / SIGNATURE).exists(), "of a manifest that is no more"


@pytest.mark.parametrize("command", ["infer", "show", "check", "sensitivity", "build", "pack", "audit"])
def test_every_command_that_reads_a_bundle_refuses_another_key(
    bundle: Path, tmp_path: Path, others: Keys, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "o.zip")] if command in ("pack", "audit") else []
    image = [str(tmp_path / "image.png")] if command == "infer" else []
    before = sorted(bundle.iterdir())
    assert run([command, str(bundle), *image, *out, "--verify", str(others.public)]) == 3
    assert "signature of" in capsys.readouterr().err
    assert sorted(bundle.iterdir()) == before
    assert not (tmp_path / "o.zip").exists()


@pytest.mark.parametrize("command", ["show", "audit"])
def test_a_key_for_what_is_not_signed_is_told(
    bundle: Path, tmp_path: Path, keys: Keys, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--model", "demo", "--out", str(tmp_path / "o")] if command == "audit" else []
    assert run([command, str(bundle / "plan.safetensors"), *out, "--verify", str(keys.public)]) == 3
    assert "means nothing to" in capsys.readouterr().err

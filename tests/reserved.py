"""Pictures whose creators said yes or no to training: 24 files, each standard in several formats, made on the fly."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path

from PIL import Image, PngImagePlugin

VALUES = ("PROHIBITED", "PROHIBITED-AIMLTRAINING", "PROHIBITED-GENAIMLTRAINING", "PROHIBITED-SEECONSTRAINT")
VALUES += ("PROHIBITED-EXCEPTSEARCHENGINEINDEXING",)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
ELEMENT, ATTRIBUTE, RESOURCE = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    f'xmlns:p="http://ns.useplus.org/ldf/xmp/1.0/"{form}</rdf:Description></rdf:RDF></x:xmpmeta>'
    for form in ("><p:DataMining>{}</p:DataMining>", ' p:DataMining="{}">', '><p:DataMining rdf:resource="{}"/>')
)


def xmp(value: str, form: str = ELEMENT) -> bytes:
    """A packet that gives `plus:DataMining` a value of its vocabulary, 'ALLOWED' say."""
    return form.format(f"http://ns.useplus.org/ldf/vocab/DMI-{value}").encode()


def picture(number: int, kind: str = "PNG", packet: bytes = b"") -> bytes:
    """A picture that is no near-copy of that of another number, with this XMP packet."""
    buffer = io.BytesIO()
    colours = [(number * 37 + step * 91) % 256 for step in range(48)]
    image = Image.frombytes("RGB", (4, 4), bytes(colours)).resize((32, 32), Image.Resampling.NEAREST)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", packet.decode("utf-8", "replace"), zip=bool(number % 2))
    options = {"PNG": {"pnginfo": text}, "TIFF": {"tiffinfo": {700: packet}}}.get(kind, {"xmp": packet})
    image.save(buffer, kind, **(options if packet else {}))
    return buffer.getvalue()


def signed(image: bytes, mime: str, label: str = "", use: str = "", parent: bytes = b"") -> bytes:
    """The picture with a C2PA manifest: what `label` says of training generative models, and the picture it was edited from."""
    import c2pa
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now, chain = datetime.datetime.now(datetime.UTC), b""
    for owner in (key, root):
        ca = owner is root
        issuer, subject = (
            x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, name)]) for name in ("root", "root" if ca else "leaf")
        )
        made = x509.CertificateBuilder(issuer, subject, owner.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=9))
        made = made.add_extension(x509.BasicConstraints(ca, None), critical=True)
        made = made.add_extension(x509.KeyUsage(True, *[False] * 4, ca, ca, False, False), critical=True)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
        if not ca:
            made = made.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        chain += made.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    signer = c2pa.Signer.from_info(
        c2pa.C2paSignerInfo(b"es256", chain, key.private_bytes(pem, pkcs8, serialization.NoEncryption()), None)
    )
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCreation"
    claims = [{"label": "c2pa.actions.v2", "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": source}]}}]
    entries = {f"{label.partition('.')[0]}.ai_generative_training": {"use": use}}
    claims = claims * (not parent) + [{"label": label, "data": {"entries": entries}}] * bool(label)
    builder = c2pa.Builder(json.dumps({"claim_generator_info": [{"name": "test", "version": "1"}], "assertions": claims}))
    if parent:
        builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
        builder.add_ingredient(json.dumps({"relationship": "parentOf"}), mime, io.BytesIO(parent))
    out = io.BytesIO()
    builder.sign(signer, mime, io.BytesIO(image), out)
    return out.getvalue()


def write_cases(folder: Path, *, c2pa: bool = True) -> dict[str, bool]:
    """Write the files, 24 with those of C2PA, and a row for each; id -> whether its creator reserves it."""
    rows: dict[str, dict[str, object]] = {"tdm-yes": {"tdm-reservation": 1, "tdm-policy": "https://ada.example/tdm"}}
    rows |= {"tdm-no": {"tdm-reservation": 0}, "noai-yes": {"noai": True}, "noai-no": {"noai": False, "noimageai": ""}}
    files: dict[str, bytes] = {}
    for number, (kind, value) in enumerate(zip(FORMATS, VALUES, strict=True)):
        suffix, form = kind.lower(), (ELEMENT, ATTRIBUTE, RESOURCE)[number % 3]
        files[f"xmp-yes-{suffix}.{suffix}"] = picture(2 * number, kind, xmp(value, form))
        files[f"xmp-no-{suffix}.{suffix}"] = picture(
            2 * number + 1, kind, xmp("UNSPECIFIED" if number % 2 else "ALLOWED", form)
        )
    for number, (name, kind) in enumerate((("plain-a", "JPEG"), ("plain-b", "AVIF"), *((name, "WEBP") for name in rows)), 10):
        files[f"{name}.{kind.lower()}"] = picture(number, kind)
    for number, kind in ((16, "JPEG"), (17, "PNG")):
        files[f"damaged-{kind.lower()}.{kind.lower()}"] = picture(number, kind, xmp("PROHIBITED")[:-40])
    files |= {"site/art/site-yes.tiff": picture(18, "TIFF"), "site/free/site-no.tiff": picture(19, "TIFF")}
    kinds = (
        ("JPEG", "c2pa", "notAllowed"),
        ("PNG", "cawg", "constrained"),
        ("WEBP", "c2pa", "allowed"),
        ("TIFF", "cawg", "allowed"),
    )
    for number, (kind, who, use) in enumerate(kinds if c2pa else (), 20):
        name = f"{who}-{'no' if use == 'allowed' else 'yes'}.{kind.lower()}"
        files[name] = signed(picture(number, kind), f"image/{kind.lower()}", f"{who}.training-mining", use)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    rules = [{"location": "/free/*.tiff$", "tdm-reservation": 0}, {"location": "/", "tdm-reservation": 1}]
    (folder / "site" / "tdmrep.json").write_text(json.dumps(rules))
    stems = {name: name.rpartition(".")[0].rpartition("/")[2] for name in files}
    lines = [{"file_name": name, "text": stems[name], **rows.get(stems[name], {})} for name in files]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {name.rpartition(".")[0]: "yes" in name for name in files}

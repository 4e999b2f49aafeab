"""The converter of MACE checkpoints: pruning, other layouts, older files, and what is refused."""

import copy
import io
import math
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from peers import mace_zoo
from peers.mace_fixtures import FOLDER, checkpoint, expected
from peers.mace_parity import arrays, check, system_of

import mdplug
from mdplug.deployed import evaluate
from mdplug.errors import InputError, ModelFileError
from mdplug.potentials.blocks.contraction import symmetric_basis
from mdplug.potentials.convert.irreps import irreps
from mdplug.potentials.convert.licences import licence_of
from mdplug.potentials.convert.mace import convert, convert_module

CASES = mace_zoo.structures()


@pytest.fixture
def stored(tmp_path):
    """tag -> the stored module."""
    return lambda tag: checkpoint(tag, tmp_path)


def agrees(model, tag):
    """Against mace-torch's stored results on a molecule and a triclinic crystal."""
    model.head = len(model.spec.heads) - 1
    for name in ("molecule", "crystal"):
        check(model, name, CASES[name], expected(tag, name))


def refused(root, match, **options):
    with pytest.raises((ModelFileError, InputError), match=match) as caught:
        convert_module(root, "x.model", **options)
    assert "\n" not in str(caught.value)
    assert "x.model" in str(caught.value)


def test_a_file_becomes_a_model_file_that_says_where_it_comes_from(tmp_path):
    with zipfile.ZipFile(FOLDER / "skeletons.zip") as archive:
        path = archive.extract("mh1.model", tmp_path)
    model = convert(path)
    spec = model.spec
    assert spec.name == "mh1"
    assert spec.architecture == "mdplug.potentials.mace:MACE"
    assert (spec.cutoff, spec.layers, spec.species, spec.heads) == (4.5, 2, (1, 8, 11), ("a", "b", "c"))
    assert spec.exchange_width == 4 * (1 + 3)
    assert spec.dtype == "float64"
    assert spec.atomic_energies["b"] == {"H": -12.6, "O": -2040.8, "Na": -6.2}
    assert spec.licence == "unknown: check the source"
    assert spec.conservative
    provenance = spec.provenance
    assert provenance["source_file"] == "mh1.model"
    assert len(provenance["source_sha256"]) == 64
    assert provenance["source_class"] == "mace.modules.models.ScaleShiftMACE"
    assert provenance["source_layers"] == ["RealAgnosticResidualNonLinearInteractionBlock"] * 2
    saved = mdplug.save(model, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="a, b, c"):
        mdplug.load(saved)
    loaded = mdplug.load(saved, head="c")
    assert loaded.spec == spec
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.with_exact_radial().state_dict()[key], value)


def test_conversion_imports_neither_mace_nor_e3nn(tmp_path):
    with zipfile.ZipFile(FOLDER / "skeletons.zip") as archive:
        path = archive.extract("density.model", tmp_path)
    program = (
        "import sys; from mdplug.potentials.convert.mace import convert; "
        f"convert({str(path)!r}); print(sorted(m for m in sys.modules if m.split('.')[0] in ('mace', 'e3nn')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("tag", ["multihead", "mh1", "bias-readout", "residual-3-heads"])
def test_one_head_taken_out_is_exact(stored, tag):
    whole = convert_module(stored(tag), tag)
    last = whole.spec.heads[-1]
    one = convert_module(stored(tag), tag, head=last)
    assert one.spec.heads == (last,)
    assert one.spec.atomic_energies == {last: whole.spec.atomic_energies[last]}
    agrees(one, tag)
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("tag", ["mp0", "off23", "density", "mh1", "omol"])
def test_fewer_elements_are_exact(stored, tag):
    water = {**CASES["crystal"], "numbers": [8, 8, 1, 1, 8, 1, 8, 1]}
    whole, fewer = convert_module(stored(tag), tag), convert_module(stored(tag), tag, elements=["O", 1])
    assert fewer.spec.species == (1, 8)
    whole.head = fewer.head = 0
    a, b = arrays(evaluate(whole, system_of(water))), arrays(evaluate(fewer, system_of(water)))
    for key, value in a.items():
        np.testing.assert_allclose(b[key], value, rtol=0, atol=1e-13 * max(1.0, np.abs(value).max()))
    with pytest.raises(InputError, match="atom 0 is Na"):
        evaluate(fewer, system_of(CASES["crystal"]))


def test_unknown_heads_and_elements_are_named(stored):
    refused(stored("multihead"), "no head 'default'; it has: pt_head, ft", head="default")
    refused(stored("mp0"), "element 'Li'; it knows: H O Na", elements=["H", "Li"])
    refused(stored("mp0"), "element 'Xx'", elements=["Xx"])
    with pytest.raises(InputError, match="empty"):
        convert_module(stored("mp0"), "x.model", elements=[])


def to_cueq(root):
    """The same weights in cuEquivariance's layout: flat weights [1, n], one product weight, no U."""
    waiting = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        for key, value in module.children("_parameters").items():
            flat = isinstance(value, torch.Tensor) and value.dim() == 1 and key == "weight" and ".net." not in prefix
            if flat and value.numel():
                module.children("_parameters")[key] = value.reshape(1, -1)
        waiting += [(f"{prefix}{key}.", child) for key, child in module.children("_modules").items()]
    for product in root.module("products").children("_modules").values():
        contraction = product.module("symmetric_contractions")
        parts = []
        for one in contraction.module("contractions").children("_modules").values():
            rest = one.module("weights").children("_parameters")
            parts += [one.children("_parameters")["weights_max"], *(rest[str(q)] for q in range(len(rest)))]
        contraction.children("_modules").pop("contractions")
        contraction.children("_parameters")["weight"] = torch.cat(parts, dim=1)
    return root


@pytest.mark.parametrize("tag", ["mp0", "mp0-L2", "mh1", "corr4-l2", "mixed-corr"])
def test_the_layout_of_cuequivariance(stored, tag):
    agrees(convert_module(to_cueq(stored(tag)), tag), tag)


def test_its_reduced_basis_is_refused(stored):
    root = to_cueq(stored("mp0"))
    parameters = root.module("products.0.symmetric_contractions").children("_parameters")
    parameters["weight"] = parameters["weight"][:, :13]
    refused(root, "reduced basis")


def dense(index, coefficients, sizes, l_max):
    """The coupling tensor U [M, m1.., P] with all of a monomial's weight on its sorted index."""
    width, degree = (l_max + 1) ** 2, index.shape[0]
    u = np.zeros((len(sizes), *(width,) * degree, coefficients.shape[1]))
    component = np.repeat(np.arange(len(sizes)), sizes)
    for term, m in enumerate(component):
        u[(m, *index[:, term])] += coefficients[term]
    return torch.from_numpy(u if len(sizes) > 1 else u[0])


@pytest.mark.parametrize("kind", ["ours", "rotated", "reduced", "wrong"])
def test_couplings_of_the_file_are_read_and_compared(stored, kind):
    root = stored("mp0")
    rng = np.random.default_rng(5)
    for t, l_out in ((0, 0), (0, 1), (1, 0)):
        one = root.module(f"products.{t}.symmetric_contractions.contractions.{l_out}")
        index, basis, sizes = symmetric_basis(3, l_out, 3)
        weight = one.children("_parameters")["weights_max"].numpy()
        if kind == "rotated":
            mix = rng.normal(size=(basis.shape[1],) * 2)
            basis, weight = basis @ mix, np.einsum("pq,sqk->spk", np.linalg.inv(mix), weight)
        elif kind == "reduced":
            u, s, _ = np.linalg.svd(basis, full_matrices=False)
            rank = int((s > 1e-10).sum())
            assert rank == {0: 8, 1: 12}[l_out]
            basis, weight = u[:, :rank], np.einsum("tr,tp,spk->srk", u[:, :rank], basis, weight)
        elif kind == "wrong":
            basis = basis + 0.01 * rng.normal(size=basis.shape)
        one.children("_parameters")["weights_max"] = torch.from_numpy(weight)
        one.children("_buffers")["U_matrix_3"] = dense(index, basis, sizes, 3)
    if kind == "wrong":
        refused(root, "not those of MACE")
        return
    model = convert_module(root, "mp0")
    agrees(model, "mp0")
    assert bool(model.spec.provenance["remarks"]) == (kind != "ours")


def test_attributes_that_older_files_lack(stored):
    root = stored("mp0")
    for key in (
        "apply_cutoff",
        "use_so3",
        "use_agnostic_product",
        "use_last_readout_only",
        "use_edge_irreps_first",
        "heads",
    ):
        root.state.pop(key)
    root.module("radial_embedding").state.pop("apply_cutoff")
    for t in range(2):
        state = root.module(f"interactions.{t}").state
        for key in ("edge_irreps", "radial_MLP", "irreps_out", "node_feats_irreps"):
            state.pop(key, None)
        for one in root.module(f"products.{t}.symmetric_contractions.contractions").children("_modules").values():
            for key in [k for k in one.children("_buffers") if k.endswith("_zeroed")]:
                one.children("_buffers").pop(key)
    model = convert_module(root, "mp0")
    assert model.spec.heads == ("Default",)
    agrees(model, "mp0")


def test_shapes_are_believed_over_attributes_and_it_is_said(stored):
    root = stored("mh1")
    root.state.pop("use_edge_irreps_first")
    root.state["use_agnostic_product"] = False
    root.state["heads"] = ["only"]
    model = convert_module(root, "mh1")
    remarks = " ".join(model.spec.provenance["remarks"])
    for word in ("use_edge_irreps_first", "use_agnostic_product", "heads are named only"):
        assert word in remarks
    assert model.spec.heads == ("head0", "head1", "head2")
    agrees(model, "mh1")


def test_upstreams_chebyshev_forces_are_reproduced_and_declared(stored):
    """torch's Chebyshev polynomials carry no gradient, so mace-torch's forces lack a term: kept, and said."""
    model = convert_module(stored("cheb+agnesi"), "cheb+agnesi")
    assert not model.spec.conservative
    assert "not -dE/dx" in " ".join(model.spec.provenance["remarks"])
    agrees(model, "cheb+agnesi")
    whole = copy.deepcopy(model)
    whole.radial.detached = False
    cluster, step = CASES["molecule"], 1e-4
    slope = np.zeros(3)
    for axis in range(3):
        for sign in (1, -1):
            moved = {**cluster, "positions": cluster["positions"] + 0.0}
            moved["positions"][1, axis] += sign * step
            slope[axis] -= sign * arrays(evaluate(model, system_of(moved)))["interaction_energy"][0] / (2 * step)
    np.testing.assert_allclose(arrays(evaluate(whole, system_of(cluster)))["forces"][1], slope, rtol=0, atol=1e-7)
    assert np.abs(arrays(evaluate(model, system_of(cluster)))["forces"][1] - slope).max() > 0.1 * np.abs(slope).max()


def test_weights_trained_in_float32_are_kept_in_float64(stored):
    root = stored("density")
    waiting = [root]
    while waiting:
        module = waiting.pop()
        for kind in ("_parameters", "_buffers"):
            for key, value in module.children(kind).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    module.children(kind)[key] = value.float()
        waiting += list(module.children("_modules").values())
    model = convert_module(root, "density")
    assert model.spec.dtype == "float32"
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    found = arrays(evaluate(model, system_of(CASES["crystal"])))
    reference = expected("density", "crystal")["forces"]
    assert 0 < np.abs(found["forces"] - reference).max() < 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MACELES", "latent Ewald"),
        ("PolarMACE", "POLAR"),
        ("AtomicDielectricMACE", "MDP"),
        ("AtomicDipolesMACE", "dipole"),
        ("EnergyDipolesMACE", "dipole"),
        ("SomethingElse", "SomethingElse"),
    ],
)
def test_other_models_are_refused_by_name(stored, name, words):
    root = stored("mp0")
    root.class_name = f"mace.modules.extensions.{name}"
    refused(root, words)


@pytest.mark.parametrize(
    ("key", "words"),
    [("les", "MACELES"), ("field_readout", "POLAR"), ("fukui_source_map", "POLAR"), ("surprise", "surprise.weight")],
)
def test_unknown_tensors_are_refused_by_name(stored, key, words):
    root = stored("mp0")
    child = stored("mp0").module("node_embedding.linear")
    root.children("_modules")[key] = child
    refused(root, words)


def test_unknown_tensors_inside_known_blocks_are_refused(stored):
    root = stored("mp0")
    root.module("interactions.1").children("_parameters")["gamma"] = torch.ones(1, dtype=torch.float64)
    refused(root, "interactions.1.gamma")
    root = stored("mp0")
    root.module("interactions.1.linear_up").children("_parameters")["lora_A"] = torch.ones(2, 2)
    refused(root, "interactions.1.linear_up.lora_A")


def test_missing_and_misshapen_tensors_are_refused(stored):
    root = stored("mp0")
    root.module("interactions.1.linear").children("_parameters").pop("weight")
    refused(root, "lacks interactions.1.linear.weight")
    root = stored("mp0")
    root.module("products.1.linear").children("_parameters")["weight"] = torch.zeros(63, dtype=torch.float64)
    refused(root, "products.1.linear.weight has 63 numbers")
    root = stored("mp0")
    root.module("interactions.0").class_name = "mace.modules.blocks.RealAgnosticDensityInteractionBlock"
    refused(root, "holds the tensors of another")
    root = stored("mp0")
    root.module("interactions.0").state.pop("avg_num_neighbors")
    refused(root, "avg_num_neighbors")
    root = stored("mp0")
    root.module("readouts.1.non_linearity.acts.0").state["cst"] = 1.67653
    refused(root, "normalised by 1.67653")
    for text in ("8x0e+8x2e", "8x0e+4x1o"):
        root = stored("mp0")
        root.module("interactions.0").state["hidden_irreps"] = text
        refused(root, "hidden_irreps are not as many of each degree")
    root = stored("mp0")
    root.module("interactions.0").state["hidden_irreps"] = (root, 3)
    refused(root, "is damaged")
    root = stored("omol")
    root.state["embedding_specs"]["temperature"] = dict(root.state["embedding_specs"]["total_spin"])
    refused(root, "temperature")


def test_a_module_of_another_library_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), buffer)
    (tmp_path / "net.model").write_bytes(buffer.getvalue())
    with pytest.raises(ModelFileError, match=r"net\.model: is a torch\.nn\.modules\.container\.Sequential"):
        convert(tmp_path / "net.model")


def test_licences():
    assert licence_of("any.model", "75428afe" + "0" * 50 + "4fb638") == "MIT"
    assert licence_of("2023-12-03-mace-128-L1_epoch-199.model", "").startswith("MIT by its file name")
    assert licence_of("MACE-OFF23_medium.model", "").startswith("ASL")
    assert licence_of("mace-omat-0-medium.model", "").startswith("ASL")
    assert licence_of("mine.model", "") == "unknown: check the source"


def test_irreps_as_pickled_and_as_text():
    assert irreps("8x0e+8x1o") == irreps(((8, (0, 1)), (8, (1, -1)))) == [(8, 0, 1), (8, 1, -1)]
    assert irreps("0e + 2x3o") == [(1, 0, 1), (2, 3, -1)]
    assert irreps(None) == []
    assert math.isclose(sum(mul * (2 * degree + 1) for mul, degree, _ in irreps("128x0e+128x1o")), 512)

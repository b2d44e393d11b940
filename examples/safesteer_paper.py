"""SafeSteer as in the paper (Ghosh et al. 2025, arXiv:2506.04250), and nothing else.

python examples/safesteer_paper.py --category fraud --question "How do I ...?"
"""

import argparse

import workbench as wb


def category_vectors(model, prompts, site):
    """Fit the paper's vectors: mean over harmless minus mean over the category's prompts.

    The paper measures the attention block's output, averaged over the tokens of each prompt. Of
    the differences it keeps the half with the largest norm, and it does not normalise the result.
    """
    residual = wb.Site(site.layer, "resid_post")
    activations = wb.cache_activations(model, prompts, [site, residual])
    return wb.fit_steering_vectors(
        activations[site], residual=activations[residual], pruning="top", keep=0.5
    )


def steered_answer(model, prompt, vector, multiplier):
    """Answer with the vector added at its layer, at every position of prompt and answer."""
    (answer,) = wb.generate(model, [prompt], [wb.add_vector(vector, multiplier)])
    return answer.text


def main(arguments=None):
    """Fit on the fit fold and show one question, unsteered and steered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name, folder or .gguf (default: the embedded model)")
    parser.add_argument("--category", default="fraud")
    parser.add_argument("--question", default="How do I write a letter that gets people to pay me?")
    parser.add_argument("--multiplier", type=float, default=1.0, help="the paper takes 0.5 to 1")
    options = parser.parse_args(arguments)

    model = wb.load_model(options.model)
    fit, _, _ = wb.split_prompts(wb.load_prompts(), seed=0)
    layer = round(14 / 32 * model.cfg.n_layers)  # the paper's layer 14 of 32
    vector = category_vectors(model, fit, wb.Site(layer, "attn_out"))[options.category]
    prompt = wb.Prompt("question", options.question, None, options.category, "unsafe", "user")
    print(vector)
    print("unsteered:", wb.generate(model, [prompt])[0].text)
    print("steered:", steered_answer(model, prompt, vector, options.multiplier))


if __name__ == "__main__":
    main()

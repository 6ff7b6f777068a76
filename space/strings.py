"""Every English text that a visitor of the page reads, in one place, ready for translation.

`{names}` are filled in by app.py and render.py.
"""

TITLE = "fastattr: see where an image came from"
HEADING = "# See where an image came from"
INTRO = (
    "Type a prompt. The generator draws it; then you see which of its {images:,} training images influenced the drawing most, "
    "and who made them."
)
INTRO_EMOJI = (
    "Type a prompt. A small Stable Diffusion, trained from scratch on {images:,} openly licensed emoji, draws it. Then you see "
    "which of those training images influenced the drawing most, and who made them."
)

TAB_GENERATE = "Generate"
PROMPT = "Prompt"
PROMPT_INFO_EMOJI = "A subject, then a style: openmoji, noto, twemoji or fluent. Subjects and styles may be recombined."
EXAMPLES = "Or try one of these"
EXAMPLES_EMOJI = [
    "red heart, openmoji style",
    "cat face, noto style",
    "flag: france, twemoji style",
    "grinning face with sunglasses, fluent style",
    "red apple, noto style",
    "a blue heart with stars, twemoji style",
]
SETTINGS = "Settings"
SEED = "Seed"
SEED_INFO = "The same prompt, seed and settings draw the same image."
STEPS = "Denoising steps"
GUIDANCE = "Guidance"
GUIDANCE_INFO = "How strictly the image follows the prompt."
GENERATE = "Generate and attribute"
GENERATED_IMAGE = "Generated image"
DENOISING = "Denoising"
ATTRIBUTING = "Attributing"
STEPS_HTML = [
    ("Draw", "The generator draws your prompt from noise, in about a second."),
    ("Compare", "A small network, taught by slow experiments on the generator, ranks all training images by their influence."),
    ("See", "You get the training images, their makers and licences, how the influence divides, and how sure we are."),
]

TAB_ATTRIBUTE = "Attribute yours"
FOREIGN = (
    "Upload or paste an image and give the prompt it was made from. The scores are learned for images made by this page's "
    "own generator; for any other image they say what looks and reads alike, and little about influence."
)
YOUR_IMAGE = "Your image"
YOUR_PROMPT = "Its prompt"
ATTRIBUTE = "Attribute"

TAB_COUNTERFACTUAL = "Counterfactual"
COUNTERFACTUAL_INTRO = (
    "Does it matter? For these prompts a small generator was really trained again, each time without some of its {of:,} "
    "training images, and then drew the same prompt from the same noise. It is the benchmark's generator, smaller than the "
    "one on this page, so that it can be trained many times. All prompts for which this was done are here; none is picked."
)
COUNTERFACTUAL_AVERAGE = (
    "Over all {count} prompts the error on the original rose on average by {influence:.1%} without the most influential, by "
    "{similarity:.1%} without the most similar and by {random:.1%} without a few at random: no other model knows a "
    "picture as well as the one that drew it. With so few prompts, differences of a few percent can be chance."
)
COUNTERFACTUAL_PROMPT = "Prompt"
COUNTERFACTUAL_ORIGINAL = "Trained on everything"
COUNTERFACTUAL_METHODS = {
    "influence": "Without the {removed} most influential",
    "similarity": "Without the {removed} most similar",
    "random": "Without {removed} at random",
}
COUNTERFACTUAL_ALT = "{prompt}: {model}"
COUNTERFACTUAL_LOSS = "Error on the original: {change:+.1%}"
COUNTERFACTUAL_LOSS_BEFORE = "The picture to compare with"
COUNTERFACTUAL_MEANING = (
    "The error says how badly a model denoises the original picture; where it rises more, the images left out mattered "
    "more. A picture may change without getting worse, and one prompt proves little: compare several."
)

MEANING = (
    "What the scores mean: a training image ranks high if, as far as a fast approximation can tell, the generator would "
    "draw this picture worse had it not learned from that image. They order training images; they do not prove that "
    "anything was copied, that a creator's work was needed, or who holds rights in the result."
)
WARNINGS = "Please note"
OTHER_REVISION = (
    "The link was made with other models (revision {asked}) than those of this page (revision {found}): image and ranking may "
    "differ from what its sender saw."
)
DOMINANT = "The largest share goes to {name}: {share} of the influence, between {low} and {high}."
NO_DOMINANT = "No dominant source: no single creator's share stands out beyond its uncertainty."
UNASSIGNED_SHARE = "{share} is spread too thinly to name."

VIEW = "Rank the training images by"
VIEW_INFLUENCE = "Influence"
VIEW_PLAIN = "Plain similarity"
VIEW_DIFFERENCE = "Difference"
CARDS = "Most influential training images"
CARDS_INFO = "Most influential first. Choose an image for its details and for other generated images that it influences."
PERCENTILE_INFO = "Percentile is the place expected among all training images: 100 would be the most influential of all."
PLAIN = "Most similar training images"
PLAIN_INFO = "What looks and reads most like the image, by features that know nothing of the generator."
DIFFERENCE = "What the influence ranking changes"
DIFFERENCE_INFO = "{common} of the first {count} images are in both rankings; {others} are here by influence alone."
DIFFERENCE_SAME = "The first {count} images are the same in both rankings; only their order may differ."
ONLY_HERE = "only here"
SAME_PLACE = "same place"
PLACES_UP = "▲ {places}"
PLACES_UP_SPOKEN = "{places} places higher than in the other ranking"
PLACES_DOWN = "▼ {places}"
PLACES_DOWN_SPOKEN = "{places} places lower than in the other ranking"
CARD_ALT = "Training image: {caption}"
CREATOR = "Creator"
LICENCE = "Licence"
PERCENTILE = "Percentile"
SIMILARITY = "Similarity"
PARTS = "Of which"
PARTS_TEXT = "image {image:.2f}, words {text:.2f}"
UNKNOWN = "unknown"
SOURCE = "Source"
IMAGE_ID = "Image id"
NEAR_DUPLICATES = "+ {count} near-duplicate"
NEAR_DUPLICATES_MANY = "+ {count} near-duplicates"
FAMILY = "Near-duplicates that rank as well"
FAMILY_ITEM = "{rank}. {caption}, by {creator}"
INFLUENCES = "Other generated images that it influences"
INFLUENCES_NONE = "It is among the first for none of the {count} other generated images on record."
INFLUENCED_ALT = "Drawing: {prompt}"
INFLUENCED_ITEM = "{prompt} (rank {rank} there)"

SHARES = "Shares by creator"
SHARES_INFO = "How the influence of the whole corpus on this image divides among creators; near-duplicates count once."
SHARES_LISTED = "How the scores of the {count} images listed divide among their creators; not calibrated."
SHARE = "Share"
INTERVAL = "95% interval"
INTERVAL_TEXT = "{low} to {high}"
IMAGES = "Images"
MORE_CREATORS = "{count} more creators"

CARRY = "Carry it away"
RECEIPT = "Receipt (JSON)"
RECEIPT_NAME = "fastattr-receipt.json"
SHARES_CSV = "Shares (CSV)"
SHARES_CSV_NAME = "fastattr-shares.csv"
FIGURE = "Figure (PNG)"
FIGURE_NAME = "fastattr-figure.png"
LINK = "Permanent link"
CARRY_INFO = "The receipt names image, models and index by their checksums; <code>fastattr verify</code> holds it against them."
FIGURE_GONE = "This result is no longer in memory. Ask for it again, then save its figure."
SECONDS = "Time taken: {seconds}."
SECONDS_PART = "{stage} {seconds:.2f} s"

FOOTER = (
    "Generator {generator}. Attributor {attributor}: {images:,} training images by {creators:,} creators. "
    "Versions: {versions}. Licences of the training images: {licences}."
)
SERVING = "fastattr serves its page on {url} (stop with Ctrl+C)"
LOADING = "fastattr loads the generator {generator!r} and the attributor {attributor!r}"
LOADED = "fastattr is ready"

ERROR = "That did not work"
EMPTY_PROMPT = "The prompt is empty. Describe the image, for example: a red heart."
LONG_PROMPT = "The prompt has {found} characters; please use at most {limit}."
NO_SEED = "The seed is empty. Type a whole number, for example 0."
NO_IMAGE = "There is no image yet. Upload or paste one first."
HUGE_IMAGE = "The image has more than {limit} megapixels, or a side above {side:,} pixels. Make it smaller and upload it again."
HEAVY_IMAGE = "The image's file has more than {limit} MB. Make it smaller and upload it again."
NOT_UPLOADED = "There is no such upload any more. Upload the image again."
UNREADABLE_IMAGE = "This file is not an image that can be read. Use a PNG, JPEG, WebP or GIF file."
DAMAGED_LINK = "The link is damaged: {name} is {found!r}. Ask its sender for it again, or type the prompt yourself."
PORT_TAKEN = "Port {port} on {host} can't be used ({error}). Choose another with --port."
MISSING_MCP = "Serving tools by MCP needs pip install 'fastattr[mcp]', in an environment of its own (it pins other versions)."

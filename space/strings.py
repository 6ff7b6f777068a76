"""Every English text that a visitor of the page reads, in one place, ready for translation.

`{names}` are filled in by app.py and render.py.
"""

TITLE = "fastattr: see where an image came from"
INTRO = """# See where an image came from

Type a prompt. A small Stable Diffusion, trained from scratch on {images:,} openly licensed emoji, draws it; then you see
which training images influenced the result most, and who made them."""

TAB_GENERATE = "Generate and attribute"
PROMPT = "Prompt"
PROMPT_INFO = "A subject, then a style: openmoji, noto, twemoji or fluent. Subjects and styles may be recombined."
PROMPT_PLACEHOLDER = "red heart, openmoji style"
EXAMPLES = "Prompts to try"
EXAMPLE_PROMPTS = [
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

TAB_ATTRIBUTE = "Attribute yours"
FOREIGN = (
    "Upload or paste an image and give the prompt it was made from. The scores are learned for images made by this page's "
    "own generator; for any other image they say what looks and reads alike, and little about influence."
)
YOUR_IMAGE = "Your image"
YOUR_PROMPT = "Its prompt"
ATTRIBUTE = "Attribute"

MEANING = (
    "What the scores mean: a training image ranks high if, as far as a fast approximation can tell, the generator would "
    "draw this picture worse had it not learned from that image. They order training images; they do not prove that "
    "anything was copied, that a creator's work was needed, or who holds rights in the result."
)
WARNINGS = "Please note"
CARDS = "Most influential training images"
CARDS_INFO = "Most influential first. Similarity (at most 1) orders the images; it is not a probability."
CARD_ALT = "Training image: {caption}"
CREATOR = "Creator"
LICENCE = "Licence"
SIMILARITY = "Similarity"
UNKNOWN = "unknown"
SOURCE = "Source"
SHARES = "Shares by creator"
SHARES_INFO = "How the scores of the {count} images shown divide among their creators."
SHARE = "Share"
IMAGES = "Images"
DOWNLOAD = "Download this result (JSON)"
DOWNLOAD_NAME = "fastattr-result.json"
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
EMPTY_PROMPT = "The prompt is empty. Describe the image, for example: red heart, openmoji style."
LONG_PROMPT = "The prompt has {found} characters; please use at most {limit}."
NO_SEED = "The seed is empty. Type a whole number, for example 0."
NO_IMAGE = "There is no image yet. Upload or paste one first."
HUGE_IMAGE = "The image has more than {limit} megapixels. Make it smaller and upload it again."
UNREADABLE_IMAGE = "This file is not an image that can be read. Use a PNG, JPEG, WebP or GIF file."
PORT_TAKEN = "Port {port} on {host} can't be used ({error}). Choose another with --port."
MISSING_GRADIO = "The page needs Gradio: pip install 'fastattr[space]'"

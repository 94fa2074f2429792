() => {
  // What Gradio's components do not do by themselves: names of thumbnails, news for screen readers, the address, the fold on phones.
  document.body.classList.remove('dark');
  const status = Object.assign(document.createElement('div'), {className: 'heard', role: 'status'});

  function printed(plate) {
    const busy = plate.querySelector('.drawing') !== null;
    plate.setAttribute('aria-busy', busy);
    if (busy || plate.querySelector('.empty')) return;
    const captions = [...plate.querySelectorAll('figcaption')].map((one) => (one.firstChild?.textContent || '').trim());
    const news = `${captions.length === 1 ? 'Printed' : captions.length + ' prints'}: ${captions.join(' ')}`;
    if (status.textContent !== news) status.textContent = news;
    const link = plate.querySelector('a.address');
    if (link) history.replaceState(history.state, '', link.getAttribute('href'));
  }

  function named(gallery) {
    gallery.querySelectorAll('button.thumbnail-item').forEach((button, number, all) => {
      const name = `Print ${number + 1} of ${all.length}: ${button.querySelector('img')?.alt || ''}`;
      if (button.getAttribute('aria-label') !== name) button.setAttribute('aria-label', name);
    });
  }

  function watched(id, act) {
    const part = document.getElementById(id);
    new MutationObserver(() => act(part)).observe(part, {childList: true, subtree: true, attributes: true, attributeFilter: ['alt']});
    act(part);
  }

  function fold() {
    if (!matchMedia('(max-width: 640px)').matches) return;
    document.querySelectorAll('#more > button.open, #anew > button.open').forEach((button) => button.click());
  }

  function begin() {
    document.querySelector('main')?.append(status);
    watched('plate', printed);
    watched('history', named);
    fold();
  }

  const waiting = setInterval(() => {
    if (!document.getElementById('plate') || !document.getElementById('history')) return;
    clearInterval(waiting);
    begin();
  }, 50);
}
